"""Measurements, not tests: each file measures one thing and writes results/*.jsonl."""
