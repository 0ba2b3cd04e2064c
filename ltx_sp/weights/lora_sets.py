"""Which LoRAs each set of weights has: those of the settings, those of a request, and the distilled one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ltx_sp.request import Lora
from ltx_sp.weights.index import Index, TensorEntry, read_index
from ltx_sp.weights.lora import LoraPlan, LoraReport, plan_loras

__all__ = ["LoraSets"]


class LoraSets:
    """Plans every set of weights from the headers of the LoRAs' files. Blocks the host.

    Args:
        loras: in all sets, for the whole run.
        distilled: None where there is none.
        strengths: factor on the distilled LoRA's in each set.
        shapes: of the transformer's parameters.
        read_alphas: reads scalars.

    Raises:
        WeightsError, UnsupportedError: a file is damaged, or is no LoRA for this transformer.
    """

    def __init__(
        self,
        loras: Sequence[Lora],
        distilled: Lora | None,
        strengths: Sequence[float],
        shapes: Mapping[str, tuple[int, ...]],
        read_alphas: Callable[[Sequence[TensorEntry]], Mapping[TensorEntry, float]],
    ):
        self._loras, self._distilled, self._strengths = tuple(loras), distilled, tuple(strengths)
        self._shapes, self._read_alphas = shapes, read_alphas
        # Of the run's own files one state is used throughout; to change them later is an error where they are read.
        self._indices: dict[Path, Index] = {}
        self.base, self._reports = self._plan(())

    @property
    def reports(self) -> list[LoraReport]:
        """On the run's own files; on the distilled one for every strength that it has."""
        first, own = self._reports[0], len(self._loras)
        distilled = [reports[-1] for reports in self._reports] if self._distilled else []
        used = [report for report in distilled if report.strength] or distilled[-1:]
        return [*first[:own], *used]

    def plan(self, extra: Sequence[Lora]) -> tuple[tuple[LoraPlan, ...], list[LoraReport]]:
        """Plan the sets with a request's LoRAs too, and report on those; nothing is in force yet.

        Raises:
            WeightsError, UnsupportedError: a file is damaged, or is no LoRA for this transformer.
        """
        if not extra:
            return self.base, []
        plans, reports = self._plan(extra)
        own = len(self._loras)
        return plans, reports[0][own : own + len(extra)]

    def _plan(self, extra: Sequence[Lora]) -> tuple[tuple[LoraPlan, ...], list[list[LoraReport]]]:
        common = [(self._index(lora), lora.strength) for lora in self._loras]
        common += [(read_index(lora.path), lora.strength) for lora in extra]
        plans, reports = [], []
        for strength in self._strengths:
            loras = list(common)
            if self._distilled is not None:
                loras.append((self._index(self._distilled), strength * self._distilled.strength))
            plan, own = plan_loras(loras, self._shapes, self._read_alphas)
            plans.append(plan)
            reports.append(own)
        return tuple(plans), reports

    def _index(self, lora: Lora) -> Index:
        if lora.path not in self._indices:
            self._indices[lora.path] = read_index(lora.path)
        return self._indices[lora.path]
