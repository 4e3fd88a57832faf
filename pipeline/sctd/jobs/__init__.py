"""Jobs on clusters: submitting them, looking at them, and looking at the machines before."""
