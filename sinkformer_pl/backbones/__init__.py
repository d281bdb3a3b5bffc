"""Networks of other libraries as backbones of a task, under any normalization."""
