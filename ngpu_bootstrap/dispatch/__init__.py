"""From a client's call to a task that ended.

`dispatcher` carries a task through its attempts, `attempt` sends one order and brings the answer back, `verdicts`
judges receipts, `receipts` speaks `/ngpu/receipts/1.0.0`, `recovery` takes up what a restart left.
"""
