"""Tables and calendars in, arrays and numbers with a unit out, and the way back."""

from numpyro_sde.data.calendar import Times, as_times
from numpyro_sde.data.ragged import pad_series
from numpyro_sde.data.table import Panel, from_long

__all__ = ["Panel", "Times", "as_times", "from_long", "pad_series"]
