"""Sequential Monte Carlo: resampling, particle filters, smoothers, conditional moves."""
