"""Nothing: mmengine and XTuner import OpenCV and torchvision for pictures, and training on text never uses them."""
