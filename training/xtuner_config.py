"""XTuner's (mmengine's) configuration of a run, with every value taken from the settings.

`python -m training train` runs it, and so does XTuner's own command line (OpenCV and torchvision, which it imports for
pictures, are needed for that, or the stand-ins):

    NAMESAKE_CONFIG=assistant.toml PYTHONPATH=.:training/stand_ins \\
        python -m xtuner.tools.train training/xtuner_config.py --work-dir work/assistant/checkpoints
"""

from mmengine.dataset import InfiniteSampler
from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR, OptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import BitsAndBytesConfig
from xtuner.engine.runner import TrainLoop

from training.hooks import Checkpoint, Progress, Samples, Seeds
from training.model import Finetune, base_model
from training.packs import collate, dataset

# mmengine turns every import statement here into a placeholder that it resolves later; this is called now.
config, settings, plan, folder = __import__("training.plan").plan.configured()

packing = dict(config=config, length=plan.length, multiple=plan.step, batch=plan.batch)
# Layers are compiled for one shape: batches are filled up to it.
filled = __import__("training.packs").packs.shape(**packing) if plan.compiled else None
iterations = plan.steps * plan.accumulate
full = (plan.warmup + 1) * plan.accumulate - 1  # the iteration that applies the first step after warm-up

model = dict(
    type=Finetune,
    llm=dict(
        type=base_model,
        folder=folder,
        precision="float32" if plan.method == "full" else plan.precision,
        longest_conversation=plan.length,
    ),
    use_activation_checkpointing=plan.checkpointing,
    autocast="" if plan.precision == "float32" else plan.precision,
    batch_answers=plan.answers * plan.batch / plan.packs,
    anchor=settings.train.anchor,
    compiled=plan.compiled,
)
if plan.method == "qlora":
    model["llm"]["quantization_config"] = dict(
        type=BitsAndBytesConfig,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=f"torch.{plan.precision}",
        bnb_4bit_quant_storage=f"torch.{plan.precision}",  # ZeRO-3 shards only what looks like ordinary weights
    )
if plan.method != "full":
    model["lora"] = dict(
        type=LoraConfig,
        r=settings.train.rank,
        lora_alpha=settings.train.alpha,
        lora_dropout=settings.train.dropout,
        target_modules=list(settings.train.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )

train_dataloader = dict(
    batch_size=plan.batch,
    num_workers=0,
    dataset=dict(type=dataset, **packing),
    sampler=dict(type=InfiniteSampler, shuffle=True),
    collate_fn=dict(type=collate, shape=filled),
)

# The device's own autocast is the model's; only float16 needs its loss scaled too.
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=settings.train.rate, betas=(0.9, 0.999), weight_decay=0.0),
    clip_grad=dict(max_norm=1.0, error_if_nonfinite=False),
    accumulative_counts=plan.accumulate,
)
if plan.precision == "float16":
    optim_wrapper |= dict(type=AmpOptimWrapper, dtype="float16", loss_scale="dynamic")

# In iterations, not epochs: XTuner's own schedule rounds a short epoch's warm-up to nothing, and the rate never rises.
# The rate of a step is that of its last iteration, and does not depend on how many iterations a step has.
param_scheduler = [
    dict(type=LinearLR, start_factor=1 / (full + 1), by_epoch=False, begin=0, end=full + 1),
    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        by_epoch=False,
        begin=full,
        end=full + (plan.steps - plan.warmup) * plan.accumulate,
    ),
]

train_cfg = dict(type=TrainLoop, max_iters=iterations)

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=None,
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=Checkpoint,
        by_epoch=False,
        interval=settings.train.save_steps * plan.accumulate,
        max_keep_ckpts=2,
        accumulate=plan.accumulate,
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
custom_hooks = [
    dict(type=Seeds, seed=settings.train.seed),
    dict(type=Progress, steps=plan.steps, accumulate=plan.accumulate, warmup=plan.warmup, rate=settings.train.rate),
    dict(type=Samples, config=config, folder=folder, every=settings.train.ask_steps * plan.accumulate),
]

model_wrapper_cfg = dict(type="MMDistributedDataParallel", broadcast_buffers=False, device_ids=None)  # also on a CPU
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl" if plan.device == "cuda" else "gloo"),
)
experiment_name = f"{settings.train.run}-{__import__('time').time_ns()}"  # mmengine keeps its parts by this name
randomness = dict(seed=settings.train.seed, deterministic=False)
log_processor = dict(by_epoch=False)
log_level = "ERROR"  # mmengine warns of its own deprecations; what matters here is raised
visualizer = None
load_from = None
resume = False

del settings, plan  # only what can be written down stays: mmengine saves this configuration beside the checkpoints
