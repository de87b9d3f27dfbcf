"""The MM-Rec model. Importing this package registers it with the Hugging Face Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mmrec_train.model.configuration import PRESETS, MMRecConfig
from mmrec_train.model.memory import ChunkPlan, MemoryState
from mmrec_train.model.modeling import (
    MMRecCausalLMOutput,
    MMRecForCausalLM,
    MMRecModel,
    MMRecModelOutput,
)

AutoConfig.register(MMRecConfig.model_type, MMRecConfig, exist_ok=True)
AutoModel.register(MMRecConfig, MMRecModel, exist_ok=True)
AutoModelForCausalLM.register(MMRecConfig, MMRecForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "ChunkPlan",
    "MMRecCausalLMOutput",
    "MMRecConfig",
    "MMRecForCausalLM",
    "MMRecModel",
    "MMRecModelOutput",
    "MemoryState",
]
