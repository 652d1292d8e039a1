import sys, time, tempfile, shutil
from pathlib import Path
from tests.torture.counts import Counts
from tests.torture.kill_drill import KillDrill
from tests.torture.power_drill import PowerDrill
if __name__ == "__main__":
    counts = Counts()
    folder = Path(tempfile.mkdtemp(prefix="tort"))
    t=time.time()
    if sys.argv[1]=="kill": KillDrill(folder/"k", int(sys.argv[3]), counts).run(int(sys.argv[2]))
    if sys.argv[1]=="power": PowerDrill(folder/"p", int(sys.argv[3]), counts).run(int(sys.argv[2]))
    if sys.argv[1]=="fault":
        from tests.torture.fault_drill import FaultDrill
        d=FaultDrill(folder,counts); n=d.count_points(); print(n); d.run(range(int(sys.argv[3]),n+1,int(sys.argv[2])))
    print(counts.table()); print("\n".join(counts.failures)[:6000]); print(time.time()-t)
    if counts.ok: shutil.rmtree(folder)
    else: print(folder)
