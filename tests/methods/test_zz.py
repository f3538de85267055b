import pytest, torch
from dataclasses import replace
from recording import RecordingRun
from small_fire import SmallFire
from test_esd import QUICK, erase
@pytest.mark.parametrize("lr",[3e-6,1e-5,3e-5,1e-4])
@pytest.mark.parametrize("v",["x","full"])
def test_it(tiny_sd,tmp_path,lr,v):
    run=RecordingRun(tmp_path)
    erase(replace(QUICK,variant=v,eta=0.0,guidance_scale=1.0,learning_rate=lr,max_train_steps=40),tiny_sd,SmallFire(tmp_path),run)
    l=[r["to_base"]/r["concept"] for r in run.rows]
    print(lr,v,run.rows[0]["concept"],[round(x,3) for x in l[::6]])
