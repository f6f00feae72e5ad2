"""How XLA compiles in the tests: cheaply, which is most of their time."""

from __future__ import annotations

import importlib.metadata

FLAGS = "--xla_backend_optimization_level=0"
# Its older way to make kernels of fused operations compiles twice as fast.  A flag that
# XLA does not know ends the process: for the version alone that was looked at.
if importlib.metadata.version("jaxlib") == "0.10.2":
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
