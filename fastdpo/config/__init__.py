"""The settings of a training: `dpo_config` lists them, and `checks` refuses what can't be combined."""

from fastdpo.config.dpo_config import DPOConfig as DPOConfig
