"""What is observed while training: one callback per file."""

from .communication_monitor import CommunicationMonitor
from .dashboard import Dashboard
from .ddp_timeline import DDPTimeline
from .even_batches import EvenBatches
from .failure_channel import FailureChannel
from .line_progress import LineProgress, default_progress_callbacks
from .nonfinite_guard import NonfiniteGuard
from .random_state import RandomState
from .results_writer import ResultsWriter
from .run_environment import machine_environment, run_environment
from .run_summary import RunSummary
from .snapshots import Snapshots
from .start_banner import StartBanner
from .step_breakdown import StepBreakdown
from .stop_on_signal import StopOnSignal
from .throughput_progress_bar import ThroughputProgressBar
from .trace_writer import TraceWriter

__all__ = [
    "CommunicationMonitor",
    "DDPTimeline",
    "Dashboard",
    "EvenBatches",
    "FailureChannel",
    "LineProgress",
    "NonfiniteGuard",
    "RandomState",
    "ResultsWriter",
    "RunSummary",
    "Snapshots",
    "StartBanner",
    "StepBreakdown",
    "StopOnSignal",
    "ThroughputProgressBar",
    "TraceWriter",
    "default_progress_callbacks",
    "machine_environment",
    "run_environment",
]
