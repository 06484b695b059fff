"""Deltaic runs Qwen3.5 models (Gated DeltaNet + gated attention, dense or sparse-MoE, with vision) on one machine, fast."""
