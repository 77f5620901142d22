"""`vlmenv doctor`: tries model, processor, engine and data together, and tells what does not add up."""

from vlmenv.doctor.examination import CHECKS, Check, Finding, examine, run_doctor
from vlmenv.options.doctor import DoctorConfig

__all__ = ["CHECKS", "Check", "DoctorConfig", "Finding", "examine", "run_doctor"]
