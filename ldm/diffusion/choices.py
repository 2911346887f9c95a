"""What is chosen by name: known without torch, so that a command's help answers at once."""

from __future__ import annotations

STOCHASTIC = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")  # solvers whose noise is scaled by eta
SOLVERS = ("dpmpp_2m", "unipc", "euler", "heun", "plms", "ddpm", *STOCHASTIC)
OF_STUDENTS = ("policy", "consistency")  # how models that were distilled to few steps are sampled
POINTWISE = ("dpmpp_2m", "unipc", "euler", *STOCHASTIC, *OF_STUDENTS)  # that ask once a step and go on place by place
SCHEDULES = ("trailing", "uniform", "legacy", "karras", "exponential", "optimised")
INTERPOLATIONS = ("linear", "slerp", "nearest")  # between the cells of a field
