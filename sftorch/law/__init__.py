"""The equations on Python numbers and on tensors; nothing here knows of groups, state or kernels."""
