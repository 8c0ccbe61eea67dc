"""The ledger and the replay queue, one transaction domain.

`queue.py` is the door: asynchronous and thin. What it decides is decided by pure state machines with an injected
clock: `ledger.py` (rules: who may do what, and the record it makes) over `state.py` (what a record changes).
"""
