"""AgentRL's documents through Beanie, its own way to MongoDB: `write URI` stores one of each, `read URI` reads what is there.

Written anew after the fields and rules of AgentRL's models: roots with `_class_id`, a child class, links, enums, nulls kept,
maps with integer keys. Prints one JSON value.
"""

import asyncio
import dataclasses
import datetime
import json
import sys
from enum import Enum
from typing import Any, Dict, List, Literal, Optional

from beanie import Document, Link, init_beanie
from pydantic import Field
from pymongo import AsyncMongoClient

Split = Literal["train", "valid", "test", "eval"]


class Task(Document):
    class Status(str, Enum):
        CREATED = "created"
        RUNNING = "running"
        WAITING = "waiting"
        COMPLETED = "completed"

    tid: str = ""
    split: Optional[Split] = None
    epoch: int = 0
    added_step: int = 0
    description: str = ""
    num_samples: int = 0
    scores: List[float] = []
    status: Status = Status.CREATED

    class Settings:
        is_root = True
        keep_nulls = True


class MCPTask(Task):
    servers: List[str] = []


class DispatchedSamplingTask(Document):
    class Status(str, Enum):
        PENDING = "pending"
        RUNNING = "running"
        COMPLETED = "completed"
        FAILED = "failed"
        TOOLFAILED = "toolfailed"
        FORMATERROR = "formaterror"
        REPEATERROR = "repeaterror"
        CANCELLED = "cancelled"
        DROPPED = "dropped"

    task: Link[Task]
    traj_id: int
    req_type: Literal["chatcompletions", "completions"]
    request: Optional[Any] = None
    response: Optional[Any] = None
    sampled_from: Optional[Link[Task]] = None
    priority: int = 0
    creat_time: datetime.datetime = Field(default_factory=datetime.datetime.now)
    finish_time: Optional[datetime.datetime] = None
    score: Optional[float] = None
    advantage: Optional[float] = None
    created_at_step: int = 0
    is_minio_managed: Optional[bool] = False
    task_type: Optional[str] = None
    status: Status = Status.PENDING

    class Settings:
        is_root = True
        keep_nulls = True


class Record(Document):
    class Status(str, Enum):
        CREATED = "created"
        RUNNING = "running"
        COMPLETED = "completed"
        FAILED = "failed"
        SCORING = "scoring"
        SCORED = "scored"
        READY = "ready"
        ABANDONED = "abandoned"

    task: Link[Task]
    split: Split
    traj_id: Optional[int] = None
    traj: List[Link[DispatchedSamplingTask]] = Field(default_factory=list)
    meta_infos: Dict[str, Any] = {}
    status: Status = Status.CREATED
    score: Optional[float] = None
    trained_count: int = 0
    last_trained_step: int = -1

    class Settings:
        is_root = True
        keep_nulls = True


@dataclasses.dataclass
class RecordData:
    messages: List[Dict[str, Any]]
    tools: Optional[List[Dict[str, Any]]]
    scores: Dict[int, float]
    advantages: Dict[int, float]
    created_at_step: Dict[int, int]
    reward: float
    step: int
    logprobs: Optional[Dict[int, Any]]
    record_id: Optional[str] = None


class DBRecordData(Document, RecordData):
    split: str
    fetched: bool = False

    class Settings:
        is_root = True
        keep_nulls = True


MESSAGES = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 2, \"b\": 3.0}"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"$defs": {"n.x": {"$ref": "#/a"}}, "minimum": 1.0, "maximum": 9007199254740993, "10": None, "2": True}}}]


def sample(task, upto, **more):
    message = MESSAGES[upto]
    return DispatchedSamplingTask(
        task=task,
        traj_id=0,
        req_type="chatcompletions",
        request={"messages": MESSAGES[:upto], "tools": TOOLS, "model": "m"},
        response={"choices": [{"index": 0, "message": message, "logprobs": None}]},
        status=DispatchedSamplingTask.Status.COMPLETED,
        finish_time=datetime.datetime(2026, 1, 2),
        **more,
    )


async def write():
    task = MCPTask(tid="t", split="train", num_samples=2, scores=[1.0, 0.0], status=Task.Status.COMPLETED, servers=["s"])
    await task.insert()
    first = sample(task, 1, created_at_step=4)
    second = sample(task, 3, advantage=0.25)
    failed = sample(task, 3)
    failed.status = DispatchedSamplingTask.Status.FAILED
    for one in (first, second, failed):
        await one.insert()
    record = Record(task=task, split="train", traj_id=0, traj=[first, second, failed], status=Record.Status.READY, score=1.0)
    await record.insert()
    await Record(task=task, split="train", status=Record.Status.CREATED).insert()
    data = RecordData(MESSAGES, TOOLS, {3: 1.0}, {3: 0.5}, {3: 7}, 1.0, 2, None)
    await DBRecordData(**dataclasses.asdict(data), split="train").insert()
    return {"record": str(record.id), "messages": MESSAGES, "tools": TOOLS}


async def read():
    records = []
    async for record in Record.find(Record.status == Record.Status.READY, with_children=True):
        task = await record.task.fetch(True)
        traj = [await link.fetch(True) for link in record.traj]
        records.append(
            {
                "split": record.split,
                "score": record.score,
                "trained_count": record.trained_count,
                "last_trained_step": record.last_trained_step,
                "meta_infos": record.meta_infos,
                "task": {"class": type(task).__name__, "status": task.status.value, "scores": task.scores, "split": task.split},
                "traj": [
                    {
                        "status": one.status.value,
                        "request": one.request,
                        "message": one.response["choices"][0]["message"],
                        "advantage": one.advantage,
                        "score": one.score,
                        "created_at_step": one.created_at_step,
                    }
                    for one in traj
                ],
            }
        )
    data = []
    async for one in DBRecordData.find(DBRecordData.fetched == False, DBRecordData.split == "train", with_children=True):  # noqa: E712
        fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(RecordData)}
        # JSON has no integer keys: their type is told apart.
        fields["integer_keys"] = all(isinstance(key, int) for name in ("scores", "advantages", "created_at_step") for key in fields[name])
        data.append(fields)
    return {"records": records, "data": data}


async def main():
    command, uri = sys.argv[1:]
    client = AsyncMongoClient(uri)
    models = [Task, MCPTask, DispatchedSamplingTask, Record, DBRecordData]
    await init_beanie(database=client.get_default_database(), document_models=models)
    print(json.dumps(await {"write": write, "read": read}[command]()))
    await client.close()


asyncio.run(main())
