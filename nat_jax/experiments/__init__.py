"""The paper's experiments: shared configs, the suite that runs them, and its verdicts."""
