"""What the user asks for, and how the process is to run: the only configuration there is. No torch.

Command-line defaults come from the fields below. None means the model version's own default, which the plan
fills in.
"""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise
from pathlib import Path

from ltx_sp.errors import RequestError

DEFAULT_NEGATIVE_PROMPT = (
    "low quality, blurry, out of focus, overexposed, washed out colours, compression artefacts, flicker, jitter, "
    "static frame, stuttering motion, warped faces, extra limbs, deformed hands, subtitles, captions, watermark, "
    "logo, distorted voice, robotic voice, off-sync audio, hiss, clipping, echo, background noise, silence"
)

PIPELINES = ("one-stage", "two-stages", "two-stages-hq", "distilled")
"""Ways from noise to a clip; all but the first denoise at half size, double it, and refine."""

DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
"""The noise levels that the distilled checkpoints were trained on."""


@dataclasses.dataclass(frozen=True)
class GuidanceRequest:
    """How strongly one stream is steered; None leaves a field to the model version's default.

    Args:
        cfg_guidance_scale: away from the negative prompt; 1 turns it off.
        stg_guidance_scale: away from a pass without self-attention in ``stg_blocks``; 0 turns it off.
        rescale_scale: 0..1, how far the guided spread is pulled back to the unguided one.
        stg_blocks: transformer blocks whose self-attention the perturbed pass skips.
        modality_scale: away from a pass in which picture and sound ignore each other; 1 turns it off.
    """

    cfg_guidance_scale: float | None = None
    stg_guidance_scale: float | None = None
    rescale_scale: float | None = None
    stg_blocks: tuple[int, ...] | None = None
    modality_scale: float | None = None

    def check(self, stream: str) -> None:
        """Raise RequestError where a number cannot be meant."""
        for name in ("cfg_guidance_scale", "stg_guidance_scale", "rescale_scale", "modality_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                shown = f"{name} (--{'a2v' if stream == 'video' else 'v2a'}-guidance-scale)"
                raise RequestError(
                    f"The {stream} {shown if name == 'modality_scale' else name} is {value}; it must be a finite "
                    "number. Leave it out for the default."
                )
        if self.rescale_scale is not None and not 0 <= self.rescale_scale <= 1:
            raise RequestError(f"The {stream} rescale_scale is {self.rescale_scale}; it must lie in 0..1.")


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA that is merged into the transformer.

    Args:
        path: a safetensors file, or one of PyTorch's.
        strength: factor on what it adds.
    """

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise RequestError(f"The strength of the LoRA {self.path} is {self.strength}; it must be a finite number.")


@dataclasses.dataclass(frozen=True)
class Image:
    """A picture that a clip is to show.

    Args:
        path: any format that PyAV reads. Scaled to cover the clip's size, and cropped around its centre.
        frame: at which frame; 0 replaces the first frame, others lead towards the picture.
        strength: 0..1, how much of the picture is kept; 1 keeps all of it.
    """

    path: Path
    frame: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.frame < 0:
            raise RequestError(f"The image {self.path} is at frame {self.frame}; frames count from 0.")
        if not 0 <= self.strength <= 1:  # nor is NaN
            raise RequestError(f"The strength of the image {self.path} is {self.strength}; it must lie in 0..1.")


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip.

    Args:
        prompt: what to show and to be heard.
        negative_prompt: what to steer away from.
        seed: of the noise; equal seeds give equal clips on any number of ranks, up to rounding.
        height, width: pixels, multiples of 32, or of 64 where the pipeline has two stages; None for the pipeline's
            own size.
        num_frames: 8k + 1.
        frame_rate: frames per second.
        num_inference_steps: denoising steps of the first stage; None for the default of pipeline and model version.
        sigmas: the first stage's noise levels themselves, falling from at most 1 to 0, instead of
            ``num_inference_steps``.
        video, audio: guidance of each stream in the first stage; the second has none.
        images: pictures to show, each at its frame.
        image_crf: how strongly H.264 compresses the pictures first, 0..51, as the model was trained on; 0 leaves
            them as they are, None is the model version's own.
        audio_path: sound that the clip is made for and gets, instead of making its own.
        video_path: frames that sound is made for, instead of making frames. One stage only.
        loras: for this clip only, in all stages; the weights are as before afterwards.
    """

    prompt: str
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    seed: int = 10
    height: int | None = None
    width: int | None = None
    num_frames: int = 121
    frame_rate: float = 24.0
    num_inference_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    video: GuidanceRequest = GuidanceRequest()
    audio: GuidanceRequest = GuidanceRequest()
    images: tuple[Image, ...] = ()
    image_crf: int | None = None
    audio_path: Path | None = None
    video_path: Path | None = None
    loras: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RequestError("The prompt is empty; say what the clip should show, with --prompt.")
        for name in ("height", "width", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1.")
        if not (math.isfinite(self.frame_rate) and 1 <= self.frame_rate <= 240):
            raise RequestError(f"frame_rate is {self.frame_rate}; it must lie in 1..240 frames per second.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}; it must lie in 0..2^63 - 1.")
        if self.sigmas is not None:
            self._check_sigmas(self.sigmas)
        elif self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise RequestError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1.")
        self.video.check("video")
        self.audio.check("audio")
        self._check_media()

    def _check_media(self) -> None:
        at = [image.frame for image in self.images]
        for image in self.images:
            if image.frame >= self.num_frames:
                raise RequestError(
                    f"The image {image.path} is at frame {image.frame}; the clip has the frames 0 to "
                    f"{self.num_frames - 1}. Choose one of them, or a longer clip."
                )
            if at.count(image.frame) > 1:
                raise RequestError(f"Several images are at frame {image.frame}; each needs a frame of its own.")
        if self.image_crf is not None and not self.images:
            raise RequestError(f"image_crf is {self.image_crf} and there is no image; leave it out.")
        if self.image_crf is not None and not 0 <= self.image_crf <= 51:
            raise RequestError(f"image_crf is {self.image_crf}; it must lie in 0..51.")
        if self.video_path is not None and (self.audio_path is not None or self.images):
            other = "an audio file" if self.audio_path is not None else "an image"
            raise RequestError(f"A video is given, and {other} too; frames that are given leave only sound to make.")

    def _check_sigmas(self, sigmas: tuple[float, ...]) -> None:
        if self.num_inference_steps is not None:
            raise RequestError(
                f"Both sigmas and num_inference_steps = {self.num_inference_steps} are given; the sigmas fix the "
                "steps. Leave one out."
            )
        falling = all(a > b for a, b in pairwise(sigmas))
        if not all(map(math.isfinite, sigmas)) or len(sigmas) < 2 or not falling or sigmas[0] > 1 or sigmas[-1] != 0:
            raise RequestError(
                f"The sigmas are {' '.join(f'{sigma:g}' for sigma in sigmas)}; they must fall strictly, from at most 1 "
                "down to 0. Give at least two."
            )
        if sigmas[0] < 0.99:
            raise RequestError(
                f"The sigmas start at {sigmas[0]:g}; a clip that is made from noise alone must start at 1, or 0.99 "
                "at least."
            )


CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "attention": ("auto", "sdpa", "fa3", "fa4"),
    "video_to_audio": ("partial", "gather"),
    "load_mode": ("auto", "stream", "preload", "mmap"),
    "pipeline": PIPELINES,
    "cuda_graph": ("auto", "on", "off"),
    "residency": ("auto", "legacy", "snapshot-low-vram", "snapshot", "resident", "sharded"),
}
"""What the fields of ``Settings`` that name something may say."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the process runs: which weights, where, in what precision.

    Args:
        checkpoint_path: a published ``.safetensors`` file, or a folder in the diffusers layout.
        gemma_root: the folder of the Gemma 3 text encoder; a diffusers folder holds its own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``bfloat16`` or ``float32``: of weights and latents. The text encoder's states overflow float16.
        attention: ``auto``, ``sdpa``, ``fa3`` or ``fa4``.
        video_to_audio: ``partial`` merges partial attention by log-sum-exp, ``gather`` collects keys and values.
        parallel: ``GxP``: G ranks on the guidance axis, over which the passes of a guided step are dealt, and P on the
            token axis; stages without guidance put all of them on the token axis. ``auto`` chooses by predicted time.
        calibration: what ``profiling/calibrate.py`` measured, for ``parallel`` and ``max_batch_size``; None for what
            it keeps in the cache folder, or else figures from data sheets.
        max_batch_size: guidance passes that run as one batch, at most; the isolated one always runs alone. None: as
            many as are predicted to take the least time, where memory allows; on a CPU one.
        compile: have torch.compile fuse what lies between a block's products and attentions; the first step of each
            size takes its time.
        cuda_graph: ``on`` replays steps from CUDA graphs, ``off`` runs each as it is; ``auto`` is on with CUDA.
        keep_text_encoder: keep the text encoder beside the transformer instead of freeing it after encoding.
        peer_timeout: seconds of silence after which a rank counts as lost.
        load_mode: how weights get in: ``stream`` through small buffers, ``preload`` into host memory first, once per
            host, ``mmap`` from the page cache; ``auto`` chooses by the device.
        loras: merged into the transformer while it is loaded, for all requests and stages.
        overlap_lora: merge LoRAs while other components load and prompts are encoded, not afterwards.
        verify_weights: refuse weights that are not finite, and compare what the ranks hold (the first stage's set).
        pipeline: ``one-stage``; ``two-stages`` and ``two-stages-hq`` with a distilled LoRA; ``distilled`` for a
            checkpoint that is distilled itself.
        spatial_upsampler_path: the latent upsampler's file, for pipelines of two stages.
        distilled_lora: its strength is a factor on what the pipeline gives it: ``two-stages`` 1.0 in the second
            stage, ``two-stages-hq`` 0.25 in the first and 0.5 in the second.
        residency: where the weights of both stages live, see docs/residency.md; ``auto`` chooses by memory.
    """

    checkpoint_path: Path
    gemma_root: Path | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    attention: str = "auto"
    video_to_audio: str = "partial"
    parallel: str = "auto"
    calibration: Path | None = None
    max_batch_size: int | None = None
    compile: bool = False
    cuda_graph: str = "auto"
    keep_text_encoder: bool = False
    peer_timeout: float = 30.0
    load_mode: str = "auto"
    loras: tuple[Lora, ...] = ()
    overlap_lora: bool = True
    verify_weights: bool = False
    pipeline: str = "one-stage"
    spatial_upsampler_path: Path | None = None
    distilled_lora: Lora | None = None
    residency: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        if self.parallel != "auto" and not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", self.parallel):
            raise RequestError(
                f"parallel is {self.parallel!r}; it must be auto, or ranks for guidance x ranks for tokens, such "
                "as 2x4."
            )
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise RequestError(f"max_batch_size is {self.max_batch_size}; it must be at least 1.")
        if not (math.isfinite(self.peer_timeout) and self.peer_timeout >= 1):
            raise RequestError(f"peer_timeout is {self.peer_timeout}; it must be at least 1 second.")
        if not self.overlap_lora and not self.loras and self.distilled_lora is None:
            raise RequestError("overlap_lora is off (--no-overlap-lora) and there is no LoRA; leave it out.")
        for name, what, pipelines in (
            ("spatial_upsampler_path", "a latent upsampler (--spatial-upsampler-path)", PIPELINES[1:]),
            ("distilled_lora", "a distilled LoRA (--distilled-lora)", ("two-stages", "two-stages-hq")),
        ):
            if self.pipeline in pipelines and getattr(self, name) is None:
                raise RequestError(f"The pipeline {self.pipeline} needs {what}, and none is given. Pass its file.")
            if self.pipeline not in pipelines and getattr(self, name) is not None:
                raise RequestError(
                    f"The pipeline {self.pipeline} has no use for {what}. Leave it out, or choose --pipeline "
                    f"{', '.join(pipelines)}."
                )
