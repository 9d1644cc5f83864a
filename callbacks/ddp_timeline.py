"""The communication of Lightning's own ``ddp``, read from DDP's runtime statistics: the baseline stays untouched.

Found by running torch 2.14.1 on gloo:

* Times are nanoseconds. Statistics belong to the last iteration (forward + backward pass) that synchronized;
  passes under ``no_sync()`` are not iterations. ``iteration`` counts from 1.
* DDP itself files them at the *next* forward pass. On the CPU we ask for it at once, which costs 20 microseconds.
* ``backward_comm_time`` is from the first bucket's launch to the end of the last, copying back included, gaps
  included. ``backward_compute_comm_overlap_time`` is from that launch to the end of the local backward pass.
  Their difference is what training waited.
* The broadcast of buffers before a forward pass is in none of the figures.
"""

from __future__ import annotations

import time
from typing import Any, final

from torch.nn.parallel import DistributedDataParallel

from ..comm.algorithms.algorithm import ring_bytes
from ..comm.timeline import StepCommunication
from ..comm.tracer import COMMUNICATION, Tracer

_NS_PER_MS = 1e6


@final
class DDPTimeline:
    """Same seam as ``strategy.timeline``. Every rank may make one per DDP module; nothing here is collective.

    With CUDA parameters the statistics are events on the device: reading them early would make the host wait for
    it, so there :meth:`take_step` returns the step *before* the last one, as DDP filed it. Not run on GPU yet.

    Only the last synchronizing backward pass of a step is seen: a step with several of them (manual optimization
    of two networks, say) shows less than it communicated. A compressing communication hook is counted with
    uncompressed bytes.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        ddp._set_ddp_runtime_logging_sample_rate(1)
        self._ddp = ddp
        self._on_cpu = ddp.device_type == "cpu"
        stats = ddp._get_ddp_logging_data()
        bucket_bytes = (int(size) for size in str(stats["bucket_sizes"]).split(",") if size.strip())
        self._num_bytes = ring_bytes(sum(bucket_bytes), int(stats["world_size"]))
        self._taken = int(stats.get("iteration", 0))
        self.tracer = Tracer()

    def take_step(self) -> StepCommunication | None:
        """The last synchronized iteration, unless it was taken already. Blocks for nothing."""
        if self._on_cpu and self._ddp.logger is not None:
            self._ddp.logger.set_runtime_stats_and_log()
        stats = self._ddp._get_ddp_logging_data()
        iteration = int(stats.get("iteration", 0))
        if iteration == self._taken:
            return None
        self._taken = iteration
        self._trace(stats)
        total_ns = int(stats.get("backward_comm_time", 0))
        overlap_ns = int(stats.get("backward_compute_comm_overlap_time", 0))
        return StepCommunication(
            total_ms=total_ns / _NS_PER_MS,
            exposed_ms=max(0, total_ns - overlap_ns) / _NS_PER_MS,
            num_bytes=self._num_bytes,
            total_is_upper_bound=True,
        )

    def _trace(self, stats: dict[str, Any]) -> None:
        """One span: DDP tells neither buckets nor gaps. Its stamps are of the wall clock."""
        if self.tracer.recorder is None or not (end_ns := int(stats.get("backward_comm_time_end", 0))):
            return
        to_ours = time.perf_counter_ns() - time.time_ns()
        start_ns = int(stats["backward_comm_time_start"])
        name = "all_reduce, first start to last end"
        args = {"bytes": self._num_bytes, "source": "DDP's own statistics, gaps included: an upper bound"}
        self.tracer.add(name, COMMUNICATION, start_ns + to_ours, end_ns + to_ours, **args)
