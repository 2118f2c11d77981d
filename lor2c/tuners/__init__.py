"""LoR2C and ResLoRA as PEFT methods, and baselines. Importing any module of this folder registers all with PEFT."""

from . import baselines as baselines, lor2c as lor2c, reslora as reslora
