"""What is asked of runs, finished or only planned: comparing methods, analysing weights, measuring volume and cost."""
