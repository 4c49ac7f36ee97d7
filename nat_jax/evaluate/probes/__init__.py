"""Probes: functions of two feature sets that return an accuracy."""
