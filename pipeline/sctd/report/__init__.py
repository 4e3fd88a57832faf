"""`sctd report`. In the order of the page: summary, losses and cost (`training`), scores, differences between arms
(`compare`), probing, drift and ablations (`analyses`), what was run and what is missing (`record`)."""
