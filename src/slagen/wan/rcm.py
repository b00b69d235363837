"""The few-step sampler of rCM-distilled weights (TurboWan), as a diffusers scheduler."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor


class RCMScheduler(SchedulerMixin, ConfigMixin):
    """One to four steps between fixed noise levels, each to the predicted video and, if stochastic, back to new noise.

        a = [atan(sigma_max), mid_angles[: n - 1], 0]      t = sin a / (sin a + cos a)
        x0 = x - t v        x' = (1 - t') x0 + t' noise    or, not stochastic, x' = x - (t - t') v

    The pipeline does not scale its first noise and passes no generator on: give it `initial_latents(...)` as `latents`,
    and set `generator`, which draws that and all later noise. The state is float64; latents come back as such.

    Args:
        num_train_timesteps: what the network's time of 1 is called, 1000 for Wan.
        sigma_max: the first noise level, as sigma; the network sees t = sigma / (1 + sigma).
        mid_angles: TrigFlow angles of the later steps.
        stochastic: False steps along the predicted velocity instead (the ODE form).
        round_timesteps: round the network's timesteps to bfloat16, as the weights were made.
    Source: rCM in TurboDiffusion, github.com/thu-ml/TurboDiffusion, wan2.1_t2v_infer.py.
    """

    order = 1
    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_max: float = 80.0,
        mid_angles: tuple[float, ...] = (1.5, 1.4, 1.0),
        stochastic: bool = True,
        round_timesteps: bool = True,
    ) -> None:
        self.generator: torch.Generator | None = None
        self.sigmas = torch.empty(0, dtype=torch.float64)
        self.timesteps = torch.empty(0)
        self._index = 0

    @property
    def init_noise_sigma(self) -> float:
        """The noise level t of the first step."""
        return self.config.sigma_max / (1 + self.config.sigma_max)

    @property
    def step_index(self) -> int:
        """How many steps were taken since `set_timesteps`."""
        return self._index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start from another step than the first; pipelines call it before their loop."""
        self._index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay out the noise levels: `sigmas` (n + 1,) float64 on the CPU, `timesteps` (n,) float32 on the device.

        Raises: ValueError for more steps than there are angles.
        """
        most = len(self.config.mid_angles) + 1
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"rCM takes 1 to {most} steps, not {num_inference_steps}.")
        angles = [math.atan(self.config.sigma_max), *self.config.mid_angles[: num_inference_steps - 1], 0.0]
        levels = [math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles]
        self.sigmas = torch.tensor(levels, dtype=torch.float64)
        timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).float()
        if self.config.round_timesteps:
            timesteps = timesteps.bfloat16().float()
        self.timesteps = timesteps.to(device) if device is not None else timesteps
        self._index = 0

    def initial_latents(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Noise of the first level, float64, drawn in float32 on the CPU, so that a seed means the same everywhere."""
        return self._noise(shape).mul_(self.init_noise_sigma).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: the network takes it unscaled."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from one noise level to the next.

        Args:
            model_output: predicted velocity, noise minus video.
            timestep: not needed; the steps are counted.
            sample: the latents of this level.
        Returns: the latents of the next level, float64.
        Raises: RuntimeError before `set_timesteps`, or after the last step.
        """
        if self._index + 1 >= len(self.sigmas):
            raise RuntimeError("the schedule has ended. Call set_timesteps before another step.")
        level, following = (self.sigmas[self._index + i].item() for i in (0, 1))
        x, velocity = sample.double(), model_output.double()
        if self.config.stochastic:
            noise = self._noise(tuple(x.shape)).to(x.device)  # drawn in the last step too, as TurboDiffusion does
            x = (1 - following) * (x - level * velocity) + following * noise
        else:
            x = x - (level - following) * velocity
        self._index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32).double()
