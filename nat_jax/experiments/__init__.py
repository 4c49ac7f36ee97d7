"""The paper's experiments: what their configs share, the suite that runs them, and its verdicts."""
