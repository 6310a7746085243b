from nt_utils.study.batch import main

raise SystemExit(main())
