"""The samplers that a pipeline can run with: UniPC, Euler, DPM-Solver++ and rCM."""

from typing import Any

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from slagen.formats.published import Sampler
from slagen.wan.rcm import RCMScheduler


def set_sampler(
    pipe: WanPipeline, sampler: Sampler, flow_shift: float, *, sigma_max: float = 80.0, stochastic: bool = True
) -> None:
    """Give a pipeline a sampler; UniPC keeps what else the model's own scheduler says.

    Args:
        flow_shift: of all but rCM, whose noise levels `sigma_max` sets. stochastic: rCM only.
    """
    flow: dict[str, Any] = {"num_train_timesteps": 1000}
    if sampler == "rcm":
        pipe.scheduler = RCMScheduler(sigma_max=sigma_max, stochastic=stochastic)
    elif sampler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift, **flow)
    elif sampler == "dpm++":
        pipe.scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, **flow
        )
    else:
        pipe.scheduler = UniPCMultistepScheduler.from_config(
            pipe.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        )
