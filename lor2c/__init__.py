"""Fine-tune transformers through low-rank residual connections (LoR2C), as a PEFT method."""

__version__ = "0.1.0"

from lor2c.residual import LoR2CConfig, LoR2CLayer, LoR2CModel

__all__ = ["LoR2CConfig", "LoR2CLayer", "LoR2CModel"]
