"""The factor bank: its files, its index, and the ledger of its complete shards."""
