"""What stages share: statistics, plans, pruned folders, evaluations, each with its one reader and writer."""
