"""Nothing: see the package."""

InterpolationMode = None
