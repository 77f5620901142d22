"""Checks of model, processor, engine and data together: what does not add up."""

from vlmenv.doctor.examination import CHECKS, Check, Finding, examine, findings_table
from vlmenv.options.doctor import DoctorConfig

__all__ = ["CHECKS", "Check", "DoctorConfig", "Finding", "examine", "findings_table"]
