"""Prompts -> text contexts: tokens, hidden states of every layer, projection, connectors.

C text tokens, always ``TEXT_TOKENS``; D and E the context widths of video and audio.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltx_sp.errors import WeightsError
from ltx_sp.handoff import TextContext
from ltx_sp.spec import TEXT_TOKENS

_log = logging.getLogger(__name__)


def encode_prompts(
    prompts: Sequence[str], *, tokenizer: Any, text_encoder: nn.Module, connectors: nn.Module, device: torch.device
) -> list[TextContext]:
    """Encode each prompt for both streams, in the connectors' dtype, on ``device``.

    Blocks the host. One prompt at a time: the states of all 49 layers of one prompt are 0.4 GB in bf16.

    Args:
        tokenizer, text_encoder, connectors: as ``model.upstream`` builds them, the modules loaded on ``device``.
    """
    contexts = []
    for prompt in prompts:
        ids_1C, mask_1C = tokenize(prompt, tokenizer)
        ids_1C, mask_1C = ids_1C.to(device), mask_1C.to(device)
        with torch.no_grad():
            output = text_encoder(input_ids=ids_1C, attention_mask=mask_1C, output_hidden_states=True)
            # Hidden-major: the projection's columns run through the layers of one channel first.
            states = torch.stack(output.hidden_states, dim=-1)
            del output
            video_1CD, audio_1CE, _ = connectors(states, mask_1C, padding_side="left")
        contexts.append(TextContext(video=video_1CD, audio=audio_1CE))
    return contexts


def tokenize(prompt: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokenise one prompt: ids and mask, both ``[1, C]`` int64 on the host, padded on the left.

    The text is stripped and starts with BOS. What does not fit is cut at its end, with a warning.
    """
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    if bos is None or pad is None:
        raise WeightsError(
            "The Gemma folder's tokenizer has no <bos> or no <pad> token. Fetch tokenizer.json and "
            "tokenizer_config.json again."
        )
    ids = list(tokenizer(prompt.strip(), add_special_tokens=True, verbose=False)["input_ids"])
    if ids[:1] != [bos]:
        ids.insert(0, bos)
    if len(ids) > TEXT_TOKENS:
        _log.warning(
            "The prompt has %d tokens; the text encoder takes %d: the last %d are cut.",
            len(ids),
            TEXT_TOKENS,
            len(ids) - TEXT_TOKENS,
        )
        ids = ids[:TEXT_TOKENS]
    padding = TEXT_TOKENS - len(ids)
    ids_1C = torch.tensor([[pad] * padding + ids], dtype=torch.int64)
    mask_1C = torch.tensor([[0] * padding + [1] * len(ids)], dtype=torch.int64)
    return ids_1C, mask_1C
