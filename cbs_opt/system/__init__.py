"""Threads, memory, versions and sizes of this process and machine."""
