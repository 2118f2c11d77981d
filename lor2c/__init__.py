"""Fine-tune transformers through low-rank residual connections (LoR2C), as a PEFT method.

Importing lor2c registers two methods with PEFT, for `get_peft_model` and `PeftModel.from_pretrained`:

    LoR2CConfig, LoR2CModel      low-rank residuals around layers, or around spans of layers
    ResLoRAConfig, ResLoRAModel  LoRA whose blocks also read the blocks of earlier layers

These change a model while it trains:

    merge_modules, inject_lora   two residuals become one, or one becomes LoRA on queries and values
    shrink                       ranks are lowered, the directions that matter least to the loss first
    IMCallback                   merges and injections when they are due, in any Trainer (IMLoR2C)
    RMLoRACallback               a regulariser and masked gradients, for LoRA of any kind (RM-LoRA)

And these are useful beside them:

    calibrate                    measure the units of a residual that has LoR2CConfig(units="stream")
    LoR2CLayer                   the module that holds the residuals of a layer
    last_complete_checkpoint     find the checkpoint to resume a killed Trainer from
    demo_model                   the folder of a small pretrained encoder

Whole runs are in lor2c.runs, many of them in lor2c.experiments, tuned models in lor2c.inference, and all three behind the
command `lor2c`.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lor2c.data.base import demo_model
    from lor2c.disk.checkpoints import last_complete_checkpoint
    from lor2c.training.imlor2c import IMCallback
    from lor2c.training.rm_lora import RMLoRACallback
    from lor2c.training.shrink import shrink
    from lor2c.training.surgery import inject_lora, merge_modules
    from lor2c.tuners.config import LoR2CConfig, ResLoRAConfig
    from lor2c.tuners.lor2c import LoR2CModel
    from lor2c.tuners.reslora import ResLoRAModel
    from lor2c.tuners.residual import LoR2CLayer
    from lor2c.tuners.units import calibrate

__version__ = "0.1.0"

__all__ = [
    "IMCallback",
    "LoR2CConfig",
    "LoR2CLayer",
    "LoR2CModel",
    "RMLoRACallback",
    "ResLoRAConfig",
    "ResLoRAModel",
    "calibrate",
    "demo_model",
    "inject_lora",
    "last_complete_checkpoint",
    "merge_modules",
    "shrink",
]

_HOMES = {
    "IMCallback": "training.imlor2c",
    "LoR2CConfig": "tuners.config",
    "LoR2CLayer": "tuners.residual",
    "LoR2CModel": "tuners.lor2c",
    "RMLoRACallback": "training.rm_lora",
    "ResLoRAConfig": "tuners.config",
    "ResLoRAModel": "tuners.reslora",
    "calibrate": "tuners.units",
    "demo_model": "data.base",
    "inject_lora": "training.surgery",
    "last_complete_checkpoint": "disk.checkpoints",
    "merge_modules": "training.surgery",
    "shrink": "training.shrink",
}


def __getattr__(name: str) -> Any:
    "A public name, from its module, which is loaded when it is first asked for: PEFT and transformers take seconds."
    if name not in _HOMES:
        raise AttributeError(f"module 'lor2c' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"lor2c.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterPeft(MetaPathFinder):
    """Loads our tuners, which register themselves, right after PEFT itself.

    PEFT has no entry points from which it would find methods of other packages. With one, this class could go.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_both(module: Any) -> None:
                sys.meta_path.remove(self)
                load(module)
                import_module("lor2c.tuners")

            spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    import_module("lor2c.tuners")
else:
    sys.meta_path.insert(0, _AfterPeft())
