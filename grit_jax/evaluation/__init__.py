"""Evaluation of both skills on local data: suites of tasks, scores with intervals, one report."""
