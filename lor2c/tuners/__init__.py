"""LoR2C and ResLoRA as PEFT methods. Importing any module of this folder registers both with PEFT."""

from . import lor2c as lor2c, reslora as reslora
