"""Texts by a model that is being trained, to see it get better."""

from llm.config import RunConfig
from llm.generate.generator import Writing, prompt_ids
from llm.generate.sampling import Sampling
from llm.model.transformer import Transformer
from llm.tokenizer import Tokenizer

SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def write_samples(cfg: RunConfig, model: Transformer, tokenizer: Tokenizer) -> dict[str, str]:
    """What the model writes after each of log.sample_prompts, always with the same seed."""
    return {prompt: _write(cfg, model, tokenizer, prompt) for prompt in cfg.log.sample_prompts}


def _write(cfg: RunConfig, model: Transformer, tokenizer: Tokenizer, prompt: str) -> str:
    ids = prompt_ids(tokenizer, prompt, special_tokens=False)
    return "".join(Writing(model, tokenizer, ids, max_tokens=cfg.log.sample_tokens, sampling=SAMPLING, seed=cfg.train.seed))
