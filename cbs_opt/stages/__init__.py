"""Many small prunings instead of a large one."""
