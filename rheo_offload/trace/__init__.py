"""Traces: what a run selected, recorded, replayed offline, and reported (`docs/trace.md`)."""

from rheo_offload.trace.analysis import Analysis, analyse
from rheo_offload.trace.file import Trace
from rheo_offload.trace.forecast import Machine
from rheo_offload.trace.recorder import Recorder, record
from rheo_offload.trace.replay import replay
from rheo_offload.trace.report import write_report

__all__ = ["Analysis", "Machine", "Recorder", "Trace", "analyse", "record", "replay", "write_report"]
