"""Handlers of the reference cases, one module a system; `parity.load_handlers` imports them all."""
