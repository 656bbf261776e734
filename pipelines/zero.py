"""DeepSpeed ZeRO: from a training configuration to DeepSpeed's own, and the engine it drives.

The model does not know that it is sharded, and the training loop meets DeepSpeed only as an engine with forward,
backward and step.
"""

import warnings
from typing import Any

from pipelines.train_config import TrainConfig


def deepspeed_config(config: TrainConfig, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary for one run."""
    precision: dict[str, Any] = {"bf16": {"enabled": bfloat16}}
    if bfloat16:  # 8 bits are too few to add up ranks in
        precision["communication_data_type"] = "fp32"
        if config.zero_stage > 1:  # and micro-batches; stage 1 would save what DeepSpeed's own converter cannot read
            precision["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        **precision,
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero_stage},
        # Every rank writes into a folder of its own that the checkpoint's commit gathers: see checkpoint.py.
        "checkpoint": {"use_node_local_storage": False, "load_universal": False},
        "steps_per_print": 2**31,  # progress is the training loop's business
        "wall_clock_breakdown": False,
    }


def initialize(model: Any, optimizer: Any, config: TrainConfig, *, bfloat16: bool) -> Any:
    """A DeepSpeed engine around `model` and `optimizer`; torch.distributed must be up already."""
    import deepspeed
    import torch.distributed as dist

    # DeepSpeed's calls, not ours, and one line a step in every worker's log.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if dist.get_backend() == "gloo":
        # DeepSpeed would compile a shared-memory all-reduce for the CPU, which a machine without a compiler cannot;
        # gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, bfloat16=bfloat16),
        dist_init_required=False,
    )
    return engine
