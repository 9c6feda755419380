"""Fixtures of `verification_teachers`."""

from verification_teachers import copied, teacher_folders

__all__ = ["copied", "teacher_folders"]
