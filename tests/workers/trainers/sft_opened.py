from tests.workers.trainers.tiny_release import Opened
from workers.trainers.settings import SftTask
from workers.trainers.sft import run_sft
from workers.trainers.task_file import main

main(SftTask, lambda task: run_sft(task, Opened(task.dataset)))
