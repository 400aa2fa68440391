"""The figures of a report: pure functions from `Evidence` to `Drawn`, grouped by subject. No pyplot."""
