"""Results as figures, a kind of figure a file."""

from vlm_safeguard.extras import require

require("report", "matplotlib")
