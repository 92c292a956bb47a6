"""Both skills measured on local data: suites of tasks, their scores with intervals, one report."""
