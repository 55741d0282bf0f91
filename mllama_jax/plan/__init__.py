"""Whether a job fits a slice of TPUs and how fast it can be, found out without one."""

from mllama_jax.plan.job import Job as Job
from mllama_jax.plan.planner import plan as plan
from mllama_jax.plan.planner import search as search
from mllama_jax.plan.record import Plan as Plan
from mllama_jax.plan.search import Search as Search
