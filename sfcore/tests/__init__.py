"""Tests of sfcore alone; not shipped."""
